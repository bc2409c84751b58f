"""Learning of masks: offline data, the two stages, and the choice of the mask."""
