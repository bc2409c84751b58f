"""Evaluating masks: long-context tasks, baselines, a real or a teacher-forced run, a report."""
