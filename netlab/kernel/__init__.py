"""The lab's kernel back end: real programs in Linux namespaces, behind real packet paths.

Everything here runs inside a jail (`netlab.kernel.jail`): namespaces whose only interface is
loopback, so that lab traffic can't reach a real network and nothing outlives the process.
"""
