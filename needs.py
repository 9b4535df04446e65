"""What must hold, and what must be installed? Where it is not so, one clear sentence."""
import importlib


def check(holds, sentence: str) -> None:
    """Errors: ValueError with this sentence if it does not hold."""
    if not holds:
        raise ValueError(sentence)


def library(name: str, package: str):
    """The module of an optional package. Errors: ImportError naming what to install."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"this needs {name}: pip install {package}") from None
