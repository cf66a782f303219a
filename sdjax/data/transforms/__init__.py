"""Examples to arrays for a model: crops, buckets of aspect, degradations, masks, conditions."""
