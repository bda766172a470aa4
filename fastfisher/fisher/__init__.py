"""From gradients to the inverse Fisher: blocks, sampling, and the forms of the inverse behind one interface."""
