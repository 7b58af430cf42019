"""The first lines of a script that runs where hf_ssl cannot be imported."""

BLOCKED = """
import sys

class Raise:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_ssl":
            raise ImportError("this machine has no hf_ssl")

sys.meta_path.insert(0, Raise())
"""
