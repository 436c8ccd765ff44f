"""The institution's side: it owns data, keys and the decision; the coordinator may only ask."""
