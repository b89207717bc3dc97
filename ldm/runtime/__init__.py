"""Basics of all programs.

errors                             errors, and names checked against lists
command                            parsing of flags, logging, exit status
device, ranks                      devices, precision, threads; processes of a run
files, hashes                      reading, atomic writing, SHA-256
memory, offload                    memory of a computation; weights off the device
types, version                     types of JSON; version of the package
"""
