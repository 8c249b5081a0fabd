"""What the environment says to the client library about the way to a server: certificates, and proxies."""

import os
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from data_tools.mistake import Problem, UserMistake

_FILES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")
_REMEDY = "mend it or unset it where the phase runs (the profile's env.set, or the shell)"
_SAID = 200  # characters of an error


def check() -> None:
    """Raise UserMistake, which names the variable, where the client library does not start with what it finds."""
    from openai import DefaultAsyncHttpxClient

    try:
        DefaultAsyncHttpxClient()
    except OSError as error:  # of a file, or of what ssl reads in it
        named = " or ".join(name for name in _FILES if os.environ.get(name))
        said = f"{named or 'a certificate of this system'}: not a file that can be used ({_told(error)})"
        raise UserMistake(Problem("backend", f"openai: {said}; {_REMEDY}")) from None
    except Exception as error:  # ImportError for SOCKS, ValueError, and the library's own for what is no address
        named = ", ".join(sorted({name for scheme in getproxies() for name in _variables(scheme)}))
        why = "SOCKS, which needs the package socksio" if isinstance(error, ImportError) else "no proxy's address"
        said = f"{named or 'a proxy of this system'}: names {why}"  # the address may hold a password
        raise UserMistake(Problem("backend", f"openai: {said}; {_REMEDY}")) from None


def way_to(url: str) -> str:
    """Return " by the proxy of NAME" where the environment sends requests for this address to one, else ""."""
    parts, proxies = urlsplit(url), getproxies()
    scheme = next((name for name in (parts.scheme, "all") if name in proxies), "")
    if not scheme or proxy_bypass(parts.netloc):
        return ""
    return f" by the proxy of {', '.join(_variables(scheme)) or 'this system'}"


def _variables(scheme: str) -> list[str]:
    """Return the variables that name a proxy for a scheme."""
    return [name for name in os.environ if name.lower() == f"{scheme}_proxy" and os.environ[name]]


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:_SAID]
