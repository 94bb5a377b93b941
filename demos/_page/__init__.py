"""The gallery's page: one file that holds what the demos found, and runs to play with.

`runs` trains what the first picture moves through, `zooms` the map of trainability, and `cards` reads what
the demos wrote. `build` fills the templates with it. Templates, styles, scripts and the words of both
languages are files beside.
"""
