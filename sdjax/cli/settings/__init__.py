"""Settings that other programs, and this one, leave inside images: a file each, and one table of them in `read.py`."""
