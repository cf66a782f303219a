"""Floor 1: Flax modules. They map arrays and a `Cond` to arrays, and know no schedule, mesh or config file."""
