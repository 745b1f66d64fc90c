"""The stages of a build, in their order: inventory, labels, assignment to shards, conversion, commit."""
