"""Triton kernels, one file per op; installed as ``capo.kernels`` (see ``package_dir`` in setup.py)."""

if __name__ == "kernels":
    # The checkout is on sys.path and this folder hides Hugging Face's package of the same name, which transformers asks
    # for while it loads a model. Raising here would break it, so hand over to the package that is hidden, if there is one.
    import importlib.machinery
    import importlib.util
    import os
    import sys

    __version__ = "0"  # transformers reads this where nothing is hidden
    _here = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    _spec = importlib.machinery.PathFinder.find_spec(
        "kernels", [entry for entry in sys.path if os.path.realpath(entry or os.getcwd()) != _here]
    )
    if _spec is not None and _spec.loader is not None:
        sys.modules["kernels"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
