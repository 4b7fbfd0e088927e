"""Methods over the matrices of full models, or of models and adapters, one file each: see `matrix_table`."""
