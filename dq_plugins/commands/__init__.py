"""Sub-commands: each module has HELP, EXAMPLE, add_arguments(parser) and run(args) -> exit status."""
