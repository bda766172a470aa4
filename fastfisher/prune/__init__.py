"""From scores to zeros: which tensors, which weights, by how much the others move, and what it will cost."""
