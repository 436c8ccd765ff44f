"""Multi-party runs on one machine: made-up data, whole federated rounds, and the summary and report of a run."""
