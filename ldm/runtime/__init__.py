"""Basics of all programs.

errors, warn                       errors, names checked against lists; warnings
command                            parsing of flags, logging, exit status
device, ranks                      devices, precision, threads; processes of a run
files, hashes                      reading, atomic writing, SHA-256
memory, offload                    memory of a computation; weights off the device
arguments, types, version          single values as lists; types of JSON; version of the package
"""
