"""What puts right the errors that repeat at every step: means of layers' outputs, unequal input channels."""
