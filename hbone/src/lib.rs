//! Tunnels: accept and open mTLS HTTP/2 CONNECT streams; pool, windows, drain
