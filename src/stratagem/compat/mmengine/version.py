"""The version of MMEngine whose interface this package has. OpenMMLab's packages check it when they are imported."""

from __future__ import annotations

__all__ = ["__version__", "parse_version_info", "version_info"]

__version__ = "0.10.7"


def parse_version_info(version_str: str) -> tuple[int | str, ...]:
    """Return a version as a tuple of its numbers; a release candidate adds ``"rc<number>"``.

    Args:
        version_str: such as ``"1.3.0"`` or ``"2.0.3rc4"``.
    """
    info: list[int | str] = []
    for part in version_str.split("."):
        number, found, candidate = part.partition("rc")
        if number.isdigit():
            info.append(int(number))
        if found:
            info.append(f"rc{candidate}")
    return tuple(info)


version_info = parse_version_info(__version__)
