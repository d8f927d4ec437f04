"""Display colours of channels."""

from __future__ import annotations

# Upper end of each band of wavelengths, nm, and its colour; as viewers show the usual dyes.
_BANDS = (
    (480.0, "0000FF"),  # DAPI, Hoechst
    (505.0, "00FFFF"),  # CFP
    (550.0, "00FF00"),  # FITC, GFP
    (585.0, "FFFF00"),  # YFP, TMRM
    (650.0, "FF0000"),  # TRITC, Texas Red
)
_BEYOND = "FF00FF"  # Cy5 and beyond, which the eye hardly sees


def wavelength_color(nanometres: float) -> str:
    """The colour, RRGGBB, in which to show light of a wavelength."""
    return next((color for end, color in _BANDS if nanometres < end), _BEYOND)
