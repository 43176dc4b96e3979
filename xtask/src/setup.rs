//! Making a machine ready: installs what is missing where that needs no decision (rustup, and apt as root on Debian),
//! otherwise says exactly which command would.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::browser;
use crate::command::{cargo, in_root, run, succeeds};

const WASM_TARGET: &str = "wasm32-unknown-unknown";

/// What building the browser bundle needs.
pub fn for_bundle() -> Result<()> {
    if target_installed() {
        return Ok(());
    }
    rustup(&["target", "add", WASM_TARGET])
}

/// What every test needs.
pub fn everything() -> Result<()> {
    for component in ["rustfmt", "clippy"] {
        let subcommand = component.trim_start_matches("rust");
        let present = succeeds(cargo().args([subcommand, "--version"]));
        report(component, present);
        if !present {
            rustup(&["component", "add", component])?;
        }
    }
    let present = target_installed();
    report(WASM_TARGET, present);
    if !present {
        rustup(&["target", "add", WASM_TARGET])?;
    }
    programs()
}

fn report(name: &str, present: bool) {
    eprintln!("{name}: {}", if present { "present" } else { "missing" });
}

fn target_installed() -> bool {
    let output = in_root("rustc")
        .args(["--print", "target-libdir", "--target", WASM_TARGET])
        .output();
    output.is_ok_and(|output| {
        let directory = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        // The directory itself may be left behind by a removed target.
        output.status.success() && fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some())
    })
}

fn rustup(arguments: &[&str]) -> Result<()> {
    run(in_root("rustup").args(arguments)).with_context(|| {
        format!(
            "`rustup {}` is needed; without rustup, install this part of Rust the way Rust itself was installed",
            arguments.join(" ")
        )
    })
}

/// A GPU adapter and a browser: the parts that come from the operating system.
fn programs() -> Result<()> {
    let adapter = has_vulkan_driver() || !cfg!(target_os = "linux");
    report("GPU adapter (Vulkan driver)", adapter);
    let missing_browser = match browser::find() {
        Ok(found) => {
            eprintln!(
                "browser: {} driven by {}",
                found.chromium.display(),
                found.driver.display()
            );
            Vec::new()
        }
        Err(missing) => {
            eprintln!("browser: missing {}", missing.join(" and "));
            missing
        }
    };
    if adapter && missing_browser.is_empty() {
        return Ok(());
    }

    let system = System::detect();
    let mut packages = Vec::new();
    if !adapter {
        packages.push("mesa-vulkan-drivers");
    }
    // Ubuntu's chromium package only installs a snap, which neither containers nor chromedriver can use.
    if system == System::Debian {
        packages.extend(missing_browser.iter().map(|name| {
            if *name == "chromedriver" {
                "chromium-driver"
            } else {
                *name
            }
        }));
    }
    if system != System::Other && !packages.is_empty() {
        let install = format!("apt-get install -y --no-install-recommends {}", packages.join(" "));
        if !is_root() {
            bail!("this needs root, please run it and come back:\n    sudo apt-get update && sudo {install}");
        }
        run(in_root("apt-get").args(["update", "-q"]))?;
        run(in_root("apt-get")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(install.split_whitespace().skip(1)))?;
    } else if !adapter {
        bail!(
            "no Vulkan driver: install your GPU's, or Mesa's software driver (lavapipe; the package is called mesa-vulkan-drivers or vulkan-swrast)"
        );
    }
    match browser::find() {
        Ok(_) => Ok(()),
        Err(missing) => bail!(
            "missing for the browser test: {}. {} Both must be on PATH, or be named by CHROMIUM and CHROMEDRIVER.",
            missing.join(" and "),
            match system {
                System::Ubuntu =>
                    "Ubuntu's own chromium is a snap, which the test cannot drive: install Google Chrome's .deb package \
                     and the chromedriver of the same version from `Chrome for Testing` (npx @puppeteer/browsers install chromedriver@stable).",
                _ if cfg!(target_os = "macos") => "Run: brew install --cask google-chrome chromedriver.",
                _ => "Install Chromium or Google Chrome and the chromedriver of the same version.",
            }
        ),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum System {
    Debian,
    Ubuntu,
    Other,
}

impl System {
    fn detect() -> Self {
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        Self::from_release(&release)
    }

    /// Reads the text of `/etc/os-release`.
    fn from_release(release: &str) -> Self {
        let field = |name: &str| {
            release
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
                .map(|value| value.trim_matches('"').to_owned())
                .unwrap_or_default()
        };
        let names = format!("{} {}", field("ID"), field("ID_LIKE"));
        let names: Vec<&str> = names.split_whitespace().collect();
        if names.contains(&"ubuntu") {
            Self::Ubuntu
        } else if names.contains(&"debian") {
            Self::Debian
        } else {
            Self::Other
        }
    }
}

fn is_root() -> bool {
    in_root("id")
        .arg("-u")
        .output()
        .is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

/// Whether some Vulkan driver can be expected to give an adapter: a software one always does, a hardware one when
/// there is a device node.
fn has_vulkan_driver() -> bool {
    if std::env::var_os("VK_DRIVER_FILES")
        .or_else(|| std::env::var_os("VK_ICD_FILENAMES"))
        .is_some()
    {
        return true;
    }
    let manifests: Vec<PathBuf> = [
        "/usr/share/vulkan/icd.d",
        "/etc/vulkan/icd.d",
        "/usr/local/share/vulkan/icd.d",
    ]
    .iter()
    .filter_map(|directory| fs::read_dir(directory).ok())
    .flat_map(|entries| entries.flatten().map(|entry| entry.path()))
    .collect();
    let software = manifests.iter().any(|path| {
        path.file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with("lvp_icd") || name.contains("swiftshader"))
    });
    let device = ["/dev/dri", "/dev/nvidia0", "/dev/dxg"]
        .iter()
        .any(|node| Path::new(node).exists());
    software || (device && !manifests.is_empty())
}

#[cfg(test)]
mod tests {
    use super::System;

    #[test]
    fn the_distribution_is_read_from_os_release() {
        assert!(System::from_release("PRETTY_NAME=\"x\"\nID=debian\n") == System::Debian);
        assert!(System::from_release("ID=ubuntu\nID_LIKE=debian\n") == System::Ubuntu);
        assert!(System::from_release("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n") == System::Ubuntu);
        assert!(System::from_release("ID=raspbian\nID_LIKE=debian\n") == System::Debian);
        assert!(System::from_release("ID=fedora\n") == System::Other);
        assert!(System::from_release("") == System::Other);
    }
}
