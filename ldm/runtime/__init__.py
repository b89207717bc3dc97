"""Basics that all programs share.

errors, warn                       errors, checks of names against lists; warnings
command                            parsing of flags, logging, exit status
device, ranks                      device, dtype, threads; rank and world size
files, hashes                      reading, atomic writing, SHA-256
memory, offload                    peak memory of a computation; weights kept on the CPU
arguments, types, version          single values as lists; types of JSON; version of the package
"""
