"""What a run minimises, as pure functions: state, shardings, step."""
