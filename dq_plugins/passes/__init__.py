"""Built-in passes, one file a method step. Each is registered by name through the package's entry points."""
