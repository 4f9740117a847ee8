"""The baselines every claim is measured against, each in one file like any other system."""
