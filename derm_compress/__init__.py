"""derm_compress: how far can a medical multimodal model be compressed?"""

__version__ = "0.9.0"
