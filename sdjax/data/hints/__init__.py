"""Hints of ControlNets made of photographs by arithmetic alone."""
