"""Adapters that let other libraries call MATE; each module needs the library it is named after."""
