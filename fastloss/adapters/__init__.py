"""Losses of other libraries, by their own signatures, computed by fastloss: a module for each."""
