"""Ids that SentencePiece gives to texts, and the model file that it reads: tests/data/sentencepiece.json.

    pip install sentencepiece
    PYTHONPATH=. python tests/reference/sentencepiece_ids.py

The model is trained on captions as T5's was on text, with a few rules of normalisation in place of NFKC's, which are
240 kB.
"""

from __future__ import annotations

import base64
import io
import json
import tempfile
from pathlib import Path

import sentencepiece  # pyright: ignore[reportMissingImports]

from sdjax.data.sources import openmoji

OUT = Path(__file__).parents[1] / "data/sentencepiece.json"
# Of characters, as hexadecimal numbers: what is replaced, and by what.
RULES = {
    "fb01": "66 69",  # a ligature, by two letters
    "fb03": "66 66 69",
    "9": "20",
    "a": "20",
    "a0": "20",
    "3000": "20",
    "200d": "",
    "bd": "31 2044 32",
    "ff28": "48",
    "ff45": "65",
    "65 301": "e9",
    "6e 303": "f1",
}
TEXTS = [
    "a red heart",
    "RED  Heart\t\nred",
    "\ufb01re \ufb03x \uff28\uff45art",
    "\u00a0nbsp\u3000wide \u200d",
    "pin\u0303ata pi\u00f1ata e\u0301clair n\u0303\u0303",
    "\u00bd moon, 12 o\u2019clock!",
    "\u65e5\u672c\u8a9e \u2764\ufe0f",
    "   ",
    "",
    "x" * 40,
]


def train(folder: Path, captions: list[str], rules: bool = True) -> bytes:
    """A model file; without `rules` it normalises as T5's does, by NFKC."""
    table = folder / "rules.tsv"
    table.write_text("".join(f"{old}\t{new}\n" for old, new in RULES.items()))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        model_type="unigram",
        vocab_size=300,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=1.0,
        minloglevel=2,
        **({"normalization_rule_tsv": str(table)} if rules else {}),
    )
    return model.getvalue()


def main() -> None:
    captions = list(openmoji.captions().values())[:400]
    with tempfile.TemporaryDirectory() as folder:
        model = train(Path(folder), captions)
    ids = sentencepiece.SentencePieceProcessor(model_proto=model).encode(TEXTS)
    rows = [[text, [*row, 1]] for text, row in zip(TEXTS, ids, strict=True)]
    OUT.write_text(json.dumps({"model": base64.b64encode(model).decode(), "ids": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
