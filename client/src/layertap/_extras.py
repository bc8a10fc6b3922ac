"""The error of modules that need a package which is not installed with the SDK."""

from __future__ import annotations


def missing(error: ModuleNotFoundError, module: str, imported: str, package: str, extra: str) -> ImportError:
    """The error to raise for this one: it names the extra to install, if `imported` is the package that is
    missing. Otherwise the installed package is broken, and the error stays as it is."""
    if error.name is None or error.name.partition(".")[0] != imported.partition(".")[0]:
        return error
    return ModuleNotFoundError(
        f"{module} needs {package}, of the extra '{extra}': pip install 'layertap[{extra}]'", name=error.name
    )
