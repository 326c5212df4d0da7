//! A player: the real client of a Quake 3 family game, on a screen that nobody sees, as light as it can be made.

use std::fs::File;
use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use lab::process::Process;
use lab::stack::Stack;
use lab::wait_for;

/// The client of Debian's ioquake3, and OpenArena's data for it.
const CLIENT: &str = "/usr/lib/ioquake3/ioquake3";
const DATA: &str = "/usr/lib/openarena";
/// Loading the game's data takes most of it, where other tests take the processors.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long a word of the player's may take there and back.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
const NAME: &str = "Wanderer";

/// The client, connected to a game.
pub struct Player {
    // The client ends before its screen.
    client: Process,
    _screen: Process,
    pipe: PathBuf,
    game: SocketAddr,
}

/// A player as the server's status has him.
#[derive(Debug, PartialEq, Eq)]
pub struct Standing {
    /// When the server began the game, as it says itself.
    pub game_began: String,
    pub score: i32,
    pub ping_ms: u32,
}

impl Player {
    /// Starts a client and waits until it plays at this address.
    pub fn joins(stack: &Stack, game: SocketAddr) -> Self {
        for file in [CLIENT, DATA] {
            assert!(Path::new(file).exists(), "{file} is not there: run `cargo xtask setup`");
        }
        let (dir, namespace) = (stack.lab().dir(), stack.lab().client());
        let mut screen = namespace.command("Xvfb");
        screen.args(["-displayfd", "1", "-screen", "0", "320x240x16", "-nolisten", "tcp"]);
        let screen = Process::spawn("screen", dir, screen).unwrap();
        let display = wait_for(START_LIMIT, || {
            screen.log_tail(40).lines().find_map(|line| line.trim().parse::<u32>().ok())
        });
        let display = display.unwrap_or_else(|| panic!("no screen:\n{}", screen.log_tail(40)));

        let home = dir.join("player");
        std::fs::create_dir(&home).unwrap();
        let mut client = namespace.command(CLIENT);
        client.env("DISPLAY", format!(":{display}")).env("HOME", &home).env("LIBGL_ALWAYS_SOFTWARE", "1");
        let home = home.to_str().unwrap();
        for (variable, value) in [
            ("com_basegame", "baseoa"),
            ("fs_basepath", DATA),
            ("fs_homepath", home),
            // OpenArena's protocol number, as Debian's wrapper sets it.
            ("com_legacyprotocol", "71"),
            ("com_protocol", "71"),
            ("cl_motd", "0"),
            ("com_introplayed", "1"),
            ("ttycon", "0"),
            ("name", NAME),
            // A small window, the coarsest picture, ten of them a second, no sound.
            ("r_fullscreen", "0"),
            ("r_mode", "-1"),
            ("r_customwidth", "160"),
            ("r_customheight", "120"),
            ("r_picmip", "16"),
            ("r_vertexLight", "1"),
            ("cl_renderer", "opengl1"),
            ("s_initsound", "0"),
            ("com_maxfps", "10"),
            ("com_maxfpsUnfocused", "10"),
            ("com_maxfpsMinimized", "10"),
            // Seconds of silence after which the client gives up; by default 200.
            ("cl_timeout", "5"),
            ("com_pipefile", "orders"),
        ] {
            client.args(["+set", variable, value]);
        }
        client.args(["+connect", &game.to_string()]);
        let client = Process::spawn("player", dir, client).unwrap();
        let mut player = Self { client, _screen: screen, pipe: Path::new(home).join("baseoa/orders"), game };
        let entered = wait_for(START_LIMIT, || {
            assert!(player.client.ended().is_none(), "{}", player.client.log_tail(30));
            (player.joined() == 1).then_some(())
        });
        assert!(entered.is_some(), "the client does not get into the game:\n{}", player.client.log_tail(30));
        player
    }

    /// Says something, and waits until the server has said it to everybody.
    pub fn is_heard(&mut self, word: &str) {
        // What comes through this pipe is taken as from the client's console.
        let mut orders = File::options().write(true).open(&self.pipe).unwrap();
        writeln!(orders, "say {word}").unwrap();
        let said = format!("{NAME}^7: ^2{word}");
        let heard = wait_for(ANSWER_LIMIT, || {
            assert!(self.client.ended().is_none(), "{}", self.client.log_tail(30));
            self.log().lines().any(|line| line == said).then_some(())
        });
        assert!(heard.is_some(), "{said:?} was not heard:\n{}", self.client.log_tail(30));
    }

    /// How often the client got into a game: once, unless it lost it.
    pub fn joined(&self) -> usize {
        self.log().lines().filter(|line| line.contains("entered the game")).count()
    }

    /// Whether the client ever thought that its connection was gone.
    pub fn gave_up(&self) -> bool {
        let log = self.log();
        log.contains("Server connection timed out") || log.matches("CL_InitCGame").count() != 1
    }

    fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.client.log()).unwrap()).into_owned()
    }

    /// Time that the client has had on processors.
    pub fn processor_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.client.pid())).unwrap();
        let fields: Vec<u64> = stat.split(' ').skip(13).take(2).map(|field| field.parse().unwrap()).collect();
        // A hundredth of a second is the unit on every architecture.
        Duration::from_millis(fields.iter().sum::<u64>() * 10)
    }

    /// The only player, as the server's status has him.
    pub fn standing(&self, stack: &Stack) -> Standing {
        let status = stack.lab().client().run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            wait_for(ANSWER_LIMIT, || {
                socket.send_to(b"\xff\xff\xff\xffgetstatus", self.game).unwrap();
                let mut answer = vec![0; 8 << 10];
                let length = socket.recv(&mut answer).ok()?;
                Some(String::from_utf8_lossy(&answer[..length]).into_owned())
            })
        });
        let status = status.expect("the server says its status");
        // A head, the settings, and a line for each player: score, ping, name.
        let players: Vec<&str> = status.lines().skip(2).filter(|line| !line.is_empty()).collect();
        let [player] = players[..] else { panic!("one player: {status}") };
        assert!(player.contains(NAME), "{player}");
        let mut words = player.split(' ');
        let mut number = || words.next().unwrap().parse::<i32>().unwrap();
        let (score, ping_ms) = (number(), u32::try_from(number()).unwrap());
        let (_, game_began) = status.split_once("\\g_timestamp\\").expect("the game says when it began");
        let game_began = game_began.split(['\\', '\n']).next().unwrap_or_default().to_owned();
        Standing { game_began, score, ping_ms }
    }
}
