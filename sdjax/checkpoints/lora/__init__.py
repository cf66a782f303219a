"""Files of LoRA and its relatives: read in every naming, put into a checkpoint's parameters, written, extracted."""
