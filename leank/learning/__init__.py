"""Learning a mask: ``leank.learn``."""
