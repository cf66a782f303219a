"""A config that chooses nothing of sampling: all of it is the checkpoint's."""

from configs.common import base, locked


def get_config():
    return locked(base())
