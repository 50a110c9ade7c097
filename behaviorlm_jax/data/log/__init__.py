"""A raw log, in whatever form people have it -> rows in one vocabulary."""
