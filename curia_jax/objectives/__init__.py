"""Training objectives as pure functions: state, shardings, step."""
