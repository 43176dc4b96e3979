//! How many files and sockets this process may have open.
//!
//! Separate because it is the operating system's word, and asked for once.

/// Raises the limit as far as this user may, and gives it; `None` where there is none to ask for.
#[cfg(unix)]
pub(super) fn raise() -> Option<usize> {
    // macOS calls its limit infinite and lets nobody beyond this.
    const BEYOND_INFINITY: libc::rlim_t = 10_240;

    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid place for one `rlimit`, and the call keeps no pointer to it.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return None;
    }
    let before = limit.rlim_cur;
    for wanted in [limit.rlim_max, limit.rlim_max.min(BEYOND_INFINITY)] {
        if wanted <= before {
            break;
        }
        limit.rlim_cur = wanted;
        // SAFETY: `limit` is one valid `rlimit`, which the call only reads.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } == 0 {
            return Some(usize::try_from(wanted).unwrap_or(usize::MAX));
        }
    }
    Some(usize::try_from(before).unwrap_or(usize::MAX))
}

#[cfg(not(unix))]
pub(super) fn raise() -> Option<usize> {
    None
}
