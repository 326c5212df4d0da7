//! podman at a lab's sites: each has a storage of its own in the lab's folder, and nothing of the host's is touched.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::LabError;
use crate::{Lab, Site};

/// Locks in files, since those in shared memory would be the host's; control groups without systemd.
const CONFIG: &str = "[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\nlock_type = \"file\"\n\
                      [containers]\ndefault_ulimits = []\n";
/// The variable that names it.
pub const CONFIG_VARIABLE: &str = "CONTAINERS_CONF";
/// podman lets runc keep its records where it wants to.
const RUNC_RECORDS: &str = "/run/runc";
/// What the lab's image is called.
const IMAGE: &str = "localhost/drover-lab:latest";

/// Where podman's configuration is in a lab.
pub fn config_path(lab: &Lab) -> PathBuf {
    lab.dir().join("containers.conf")
}

/// podman at a site, with what stands before each of its commands.
pub fn words(lab: &Lab, site: Site) -> Vec<String> {
    let folder = |name: &str| lab.dir().join(format!("podman-{}/{name}", site.name())).display().to_string();
    let mut words = vec!["podman".to_owned()];
    for (option, value) in [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
        words.extend([option.to_owned(), folder(value)]);
    }
    words.extend(["--storage-driver", "vfs", "--runtime", "runc"].map(str::to_owned));
    words
}

/// Runs podman at a site; gives what it prints.
pub fn run(lab: &Lab, site: Site, arguments: &[&str]) -> Result<String, LabError> {
    let words = words(lab, site);
    let mut command = lab.site(site).command(&words[0]);
    command.args(&words[1..]).args(arguments).env(CONFIG_VARIABLE, config_path(lab));
    output(command)
}

fn output(mut command: Command) -> Result<String, LabError> {
    let output = command.output().map_err(LabError::io("start podman"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(LabError::Command { command: format!("{command:?}"), output: said })
}

/// Makes one image of a root folder at both sites.
pub fn make_images(lab: &Lab, root: &Path) -> Result<(), LabError> {
    let config = config_path(lab);
    std::fs::write(&config, CONFIG).map_err(LabError::io(format!("write {}", config.display())))?;
    let archive = |name: &str| lab.dir().join(name).display().to_string();
    let (files, image) = (archive("root.tar"), archive("image.tar"));
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(root).args(["-cf", &files, "."]);
    output(tar)?;
    run(lab, Site::A, &["import", "--quiet", &files, IMAGE])?;
    // Imported again it would be another image, made at another time.
    run(lab, Site::A, &["save", "--quiet", "--output", &image, IMAGE])?;
    run(lab, Site::B, &["load", "--quiet", "--input", &image])?;
    for file in [files, image] {
        std::fs::remove_file(&file).map_err(LabError::io(format!("remove {file}")))?;
    }
    Ok(())
}

/// Creates a container at a site, of the image and with `options`.
pub fn create(
    lab: &Lab,
    site: Site,
    name: &str,
    options: &[&str],
    program: &[&str],
) -> Result<String, LabError> {
    let parent = format!("/{}", lab.dir().file_name().and_then(|name| name.to_str()).expect("a plain name"));
    let mut words = vec!["create", "--name", name, "--network", "host", "--cgroup-parent", &parent];
    // CRIU could not raise its limits again without CAP_SYS_RESOURCE, nor read filters that not all kernels show.
    words.extend(["--ulimit", "host", "--security-opt", "seccomp=unconfined"]);
    words.extend(options);
    words.push(IMAGE);
    words.extend(program);
    run(lab, site, &words)
}

/// Removes what runc keeps of the containers of a lab, by the lab's folder.
pub(crate) fn remove_records(dir: &Path) {
    for site in Site::ALL {
        let containers = dir.join(format!("podman-{}/root/vfs-containers", site.name()));
        for container in std::fs::read_dir(containers).into_iter().flatten().flatten() {
            // What is not there is removed.
            let _ = std::fs::remove_dir_all(Path::new(RUNC_RECORDS).join(container.file_name()));
        }
    }
}
