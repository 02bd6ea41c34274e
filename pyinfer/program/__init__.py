"""A model as a program: vocabulary, builder, reference executor."""
