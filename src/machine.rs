//! This machine: what others call it, and what it has.
//!
//! It is separate because servers say it to browsers and processes to each other, and neither needs the other for that. Native only.

/// This machine's name in its network, in lower case.
pub fn host_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .or_else(|| std::env::var("COMPUTERNAME").ok());
    let name = name.or_else(|| {
        let output = std::process::Command::new("hostname").output().ok()?;
        String::from_utf8(output.stdout).ok()
    })?;
    let name = name.trim().to_lowercase();
    let valid = !name.is_empty()
        && name.len() <= 253
        && name.split('.').all(|label| {
            (1..=63).contains(&label.len()) && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        });
    valid.then_some(name)
}

/// Bytes of memory that this machine has, where that can be told.
#[cfg(feature = "program")]
pub fn memory() -> Option<u64> {
    #[cfg(unix)]
    {
        // SAFETY: sysconf takes any name and touches no memory of ours.
        let (pages, page) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
        let positive = |value: libc::c_long| u64::try_from(value).ok().filter(|&value| value > 0);
        positive(pages)?.checked_mul(positive(page)?)
    }
    #[cfg(not(unix))]
    None
}
