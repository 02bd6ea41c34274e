"""Its place in the tree puts this folder on the import path, for the modules that tests share
(toy_engine.py).
"""
