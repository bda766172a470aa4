"""Published experiments on trained networks, one runnable script each."""
