"""Methods of adapters only, one file or family each; `matrix_table` knows their names."""
