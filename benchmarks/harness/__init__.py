"""What scripts and suites share: arguments, results, sizes, inputs and timing."""
