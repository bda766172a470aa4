"""Compiled backends of the ops: `native` here (C++ on CPU tensors), one folder or file per backend."""
