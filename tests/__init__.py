"""Tests of LeanK."""
