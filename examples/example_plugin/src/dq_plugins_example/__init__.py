"""An observer and a pass for dq-plugins; nothing is imported until the registry asks for it."""
