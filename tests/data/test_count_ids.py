"""Over all processes an epoch holds each id exactly once, for both loaders, also after a resumption with others."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdjax.core.errors import UserError, run_or_exit
from sdjax.data.bucketed import bucketed
from sdjax.data.count_ids import count, main
from sdjax.data.loader import loader
from sdjax.data.sources.open import ArraySource

NAMES = np.array([f"image {i}" for i in range(37)])
SOURCE = ArraySource({"id": NAMES})
BUCKETS = np.random.default_rng(0).permutation(np.repeat([0, 1, 4], [9, 12, 16]))
LOADERS = {
    "plain": (functools.partial(loader, SOURCE, 8, 5, ()), np.zeros(37, int)),
    "bucketed": (functools.partial(bucketed, SOURCE, BUCKETS, 8, 5, ()), BUCKETS),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("processes", [(1, 1), (2, 2), (4, 4), (1, 4), (4, 2), (2, 8)])
def test_each_id_once_an_epoch_over_all_processes(kind, processes):
    make, groups = LOADERS[kind]
    counts = count(make, NAMES.tolist(), groups, processes, epochs=3)
    assert (counts.repeated, counts.lost) == (0, 0)
    first, second = counts.seen[: processes[0]], counts.seen[processes[0] :]
    assert len(set(first)) == len(set(second)) == 1
    assert min(counts.seen) > 0
    assert sum(counts.seen) == 8 * counts.steps >= 3 * 37


def test_wrong_loaders_are_noticed():
    make, groups = LOADERS["plain"]
    counted = functools.partial(count, ids=NAMES.tolist(), groups=groups, epochs=1)
    unlike = counted(lambda shard: make(shard._replace(index=0)), processes=(2, 2))
    assert unlike.repeated > 10
    assert unlike.lost > 10

    def forgetful(shard):
        data = make(shard)
        data.set_state = lambda state: None
        return data

    assert counted(forgetful, processes=(1, 2)).repeated > 10


def test_missing_rows_and_repeated_ids():
    groups = np.where(BUCKETS == 0, -1, BUCKETS)
    make = functools.partial(bucketed, SOURCE, groups, 4, 0, ())
    assert count(make, NAMES.tolist(), groups, (2, 2), 1).lost == 0
    with pytest.raises(UserError, match="was read, and should have been left out"):
        count(LOADERS["bucketed"][0], NAMES.tolist(), groups, (1, 1), 1)
    with pytest.raises(UserError, match="2 ids of the data set stand for more than one row"):
        count(make, ["same"] * 3 + NAMES[3:].tolist(), groups, (1, 1), 1)


def run(*arguments):
    command = [sys.executable, "-m", "sdjax.data.count_ids", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])


def test_command_prints_a_table(tmp_path):
    sizes = [(32, 32)] * 13 + [(20, 40)] * 9 + [(60, 15)] * 2
    for number, (height, width) in enumerate(sizes):
        Image.new("RGB", (width, height)).save(tmp_path / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", "text": "x"}) for number in range(24)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    done = run(
        f"--source=folder:{tmp_path}",
        "--processes=2",
        "--epochs=2",
        "--batch_size=4",
        "--buckets=128",
        "--resume_with=4",
    )
    assert (done.returncode, done.stderr) == (0, "")
    printed = done.stdout.splitlines()
    assert printed[0] == "2 ids are in buckets that do not fill a batch, and are left out"
    assert printed[1] == f"folder:{tmp_path}: 24 ids, 2 epochs in 12 steps"
    rows = [list(map(str.strip, line.strip("|").split("|"))) for line in printed if re.match(r"\| \d", line)]
    assert [row[1] for row in rows[:-1]] == ["0 of 2", "1 of 2", "0 of 4", "1 of 4", "2 of 4", "3 of 4"]
    assert rows[-1] == ["48", "0", "0"]
    assert sum(int(row[2]) for row in rows[:-1]) == 48


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "error: --source is required"),
        (("--source=folder:/nowhere",), "error: the data folder /nowhere does not exist"),
        (("--source=x", "--processes=0"), "error: flag --processes=0"),
    ],
)
def test_mistakes_are_one_line(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["count_ids", *arguments])
    with pytest.raises(SystemExit) as exit_:
        run_or_exit(main)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == 1
