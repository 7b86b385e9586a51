"""ChainOpt: groups, steps, checks, checkpoints."""
