"""The NAT as a sans-IO object: RFC 4787 axes, mapping table, port allocators, timers."""

from netlab.nat.flow import Protocol, TcpFlag, Translated
from netlab.nat.prefix import PrefixTranslator
from netlab.nat.translator import Translator

__all__ = ["PrefixTranslator", "Protocol", "TcpFlag", "Translated", "Translator"]
